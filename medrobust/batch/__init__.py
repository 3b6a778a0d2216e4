"""A night of studies: every volume of a tree segmented (and attacked, if asked), every failure explained, nothing lost.

One idea a file, in the order of a case's way: ``discovery`` finds the files, ``naming`` gives each a name without
patient data, ``plan`` says what would be done, ``stream`` and ``nifti`` read without trusting, ``recipe`` opens the
bundle (``trust`` guards its door), ``segment`` with ``resample``, ``stitch`` and ``regrid`` makes the labels,
``volumes`` writes them, ``commit`` puts them in place, ``workers`` runs many cases at a time, ``night`` decides what to
do when one fails, ``report`` says in the morning what happened.
"""
