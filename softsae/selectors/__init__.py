"""Selection rules by the name of their architecture; each is one file on the contract."""

from softsae.selectors.contract import Selection, Selector
from softsae.selectors.softsae import SoftSAE
from softsae.selectors.topk import TopK

SELECTORS: dict[str, type[Selector]] = {"softsae": SoftSAE, "topk": TopK}

__all__ = ["SELECTORS", "Selection", "Selector", "SoftSAE", "TopK"]
