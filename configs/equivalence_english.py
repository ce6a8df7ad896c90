"""The study of `configs/equivalence.py` on English instead of source code: is it the corpus?

    apt-get install python3-doc
    python -m caat_jax.sweep --config=configs/equivalence_english.py \\
        --workdir=runs/equivalence_english --jobs=2

The text is the documentation of Python in reStructuredText, as Debian ships it: 497 documents of
prose, with examples of code between.
"""

from configs import equivalence


def get_config():
    config = equivalence.get_config()
    config.run.data.files = "/usr/share/doc/python3-doc/html/_sources/**/*.rst.txt"
    config.grid.model.sync_factor = (1.0, 0.5, 0.0)
    return config
