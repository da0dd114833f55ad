"""Other people's formats and libraries: Hugging Face, exported programs, published checkpoints."""
