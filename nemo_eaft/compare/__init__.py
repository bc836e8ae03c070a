"""Target quality against forgetting, of several models that were trained from one: ``nemo-eaft compare``.

The measures (:mod:`target`, :mod:`drift`, :mod:`text`, :mod:`probe`) take any causal model of ``transformers`` and keep
a value for each row, so that :mod:`bootstrap` can draw rows again. :mod:`statistics` compares methods where they have
learned equally much, not where they have made equally many steps.
"""
