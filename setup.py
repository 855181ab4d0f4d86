from pathlib import Path

from setuptools import setup

setup(
    name="umae",
    version="0.1.0",
    description="U-MAE: masked autoencoders whose features do not collapse, for the Hugging Face ecosystem",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    py_modules=["configuration_umae", "image_processing_umae", "modeling_umae"],
    packages=["umae"],
    install_requires=[
        "torch>=2.6,<2.14",
        "transformers>=5.4,<6",
        "datasets>=4",
        "accelerate>=1.10",
        "huggingface_hub>=1.0",
        "evaluate>=0.4.6",
        "safetensors>=0.5",
        "Pillow>=11.3",
        "numpy>=2",
        "scikit-learn>=1.5",  # the bundled digits
        "matplotlib>=3.9",
        "Jinja2>=3.1",  # the report
        "PyYAML>=6",
        "psutil>=5",
        "filelock>=4.2",  # older ones leave a killed run's lock to its loader's workers
    ],
    extras_require={
        "fast": ["simplejpeg>=1.8"],  # decodes JPEGs faster than Pillow, to the same pixels
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "trackers": ["tensorboard", "trackio", "wandb"],
        "test": ["hypothesis", "pytest", "pytest-xdist", "ruff", "simplejpeg", "tensorboard"],
    },
)
