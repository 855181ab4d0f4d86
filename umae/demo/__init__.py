"""A page in the browser to try a model. Everything but `page` works without gradio."""
