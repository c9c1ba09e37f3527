"""Versions of a model, expert by expert: blobs, manifests that name them, aliases that point at a manifest.

files.py        a folder on any fsspec URL, in which a name is written once, whole or not at all
blobs.py        one expert's weights each, named by their sha256
manifest.py     what a version is made of; named by its own sha256
aliases.py      `production`, `candidate`: moved by compare-and-swap, with their history
store.py        all of these under one URL
tensors.py, expert_blob.py          what a blob is, and whether one is what the base checkpoint has there
source.py, spans.py, publish.py     from changed tensors to blobs and a manifest
views.py        what is told of them
collect.py      what may go, and taking it away
signing.py      whose a version is
failpoints.py   where tests may kill a publisher or a collector
"""
