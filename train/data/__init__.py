"""Data for querier-aware training: transcripts to dialogues to MQDialog folders to token ids.

The modules read left to right: ``transcript`` and ``plays`` give scenes, ``speakers`` tells who talks with
whom, ``dialogue`` gives windows, ``cluster`` gives cluster ids, ``mqdialog`` writes and reads the folder,
``encode`` gives tokens. ``planted`` is a synthetic set with known habits; ``prepare`` ties them together, and
``build`` is its command line.
"""
