"""2, 3 and 4 bit weights for vision-language models: calibrate with images, serve with unchanged vLLM."""

__version__ = "0.1.0"
