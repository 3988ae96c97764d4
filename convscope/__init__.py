"""convscope: pretrain vision backbones without labels and see what they learned."""

__version__ = "0.1.0"
