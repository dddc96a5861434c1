"""Embedding dumps: a corpus in, files that others read out, whatever happens meanwhile.

The data walks through ``sources`` (what there is to embed), ``planning`` (shards),
``embedding`` (a shard's files, committed by its part of the ``index``), and ``run``
holds them together. ``reader`` opens what came of it; ``verify`` and ``merge`` work on
whole dumps. ``formats`` and ``store`` know files, and nothing of speech.
"""
