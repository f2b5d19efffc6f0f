"""From whole-slide images to a cross-validated multi-task biomarker model.

The pipeline reads from top to bottom: slides are cut into tiles (``tiling``), tiles become features
(``ctranspath``, ``features``), features meet clinical tables (``cohort``), a Transformer is trained
on them (``model``, ``training``, ``crossval``), and numbers become figures and a page (``metrics``,
``plots``, ``report``). ``simulate`` makes slides whose truth is known. Run it with ``python -m
examples.pathology --help``.
"""
