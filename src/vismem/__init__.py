"""VisMem: short-term and long-term latent vision memory for any vision-language model (arXiv 2511.11007)."""

from vismem.config import VisMemConfig
from vismem.decoding import invocation
from vismem.decoding.trace import Invocation, VisMemOutput
from vismem.model import VisMem

__version__ = "0.1.0"
__all__ = ["Invocation", "VisMem", "VisMemConfig", "VisMemOutput", "invocation"]
