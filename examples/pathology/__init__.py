"""From whole-slide images to a cross-validated multi-task biomarker model.

Packages are steps of the way. Slides are opened and cut into tiles in microns (``slides``), tiles
become features in files (``extractors``, ``features``), features meet clinical tables (``tables``)
and become labelled patients and folds (``cohort``), a Transformer is trained on them
(``training``), and what it says becomes numbers (``results``), figures (``figures``) and pages
(``report``). ``runs`` cross-validates, deploys and draws heat maps, ``study`` compares all methods
as ``jobs``, ``simulation`` makes cohorts and slides whose truth is known, and ``demo`` runs all of
it. ``cli`` alone sees the command line; what may be asked for is in ``settings``.

Run it with ``python -m examples.pathology --help``.
"""
