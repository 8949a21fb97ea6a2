"""A synthetic world of posters and questions, and the training of the tiny Qwen2-VL model that reads them."""
