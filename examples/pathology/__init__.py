"""From whole-slide images to a cross-validated multi-task biomarker model.

The pipeline reads from top to bottom. Slides are opened and cut into tiles in microns (``units``,
``slides``, ``tiling``), tiles become features in files (``ctranspath``, ``extraction``,
``features``), features meet clinical tables (``cohort``) and are split by patient (``splits``), a
Transformer is trained on them (``model``, ``losses``, ``training``, ``prediction``, ``crossval``,
``results``), and what it says becomes numbers, figures and a page (``metrics``, ``measuring``,
``plots``, ``figures``, ``report``). ``synthetic_slides`` draws slides whose truth is known, and
``demo`` runs all of it on them; ``simulate`` makes feature files whose truth is known.
``benchmark`` runs all methods as jobs (``jobs``, ``cluster``), and ``study_report`` says what came
out. ``cli`` is the only module that sees the command line, ``config`` checks settings, ``errors``
tells wrong use from failed work, ``tables``, ``files`` and ``devices`` read what both halves need.

Run it with ``python -m examples.pathology --help``.
"""
