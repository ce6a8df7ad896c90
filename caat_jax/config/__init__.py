"""The configuration: fields checked one by one and together, as frozen dataclasses, as stored JSON.

`errors` and `files` come before it; everything else may import it.
"""
