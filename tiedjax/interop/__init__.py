"""Other people's models: local directories as Hugging Face's transformers writes them."""

from tiedjax.interop.folder import ModelFolder, Tie, is_model_folder, missing_in_words
from tiedjax.interop.rows import Rows
from tiedjax.interop.tensors import Tensor, read_safetensors

__all__ = ["ModelFolder", "Rows", "Tensor", "Tie", "is_model_folder", "missing_in_words", "read_safetensors"]
