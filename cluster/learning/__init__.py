"""What the mesh learns from, and which experts are to learn it.

    records.py      what is kept of a request, a text or what a user says of an answer; shards of them in Parquet
    stream.py       the shards in order, each written once; what is forgotten, and what is too old
    split.py        which samples are held out: by hash, before anything else
    filters.py      what is worth learning: no duplicates, nothing too short, repeated or from one user alone
    reservoir.py    what is replayed: a bounded sample of all that was seen, even over domains
    choose.py       which experts the new samples are about
    text_files.py   text files, and what is in them
    sources.py      the same as records
    backlog.py      what waits to be learnt, and what of it is next
    journal.py      how far a loop is: the round that goes on, what was used, what is replayed
    judge.py        whether what was learnt may be served
    change.py       whether a mean has risen, by a test that may be looked at for ever
    off_policy.py   what another way of choosing versions would have earned, from choices by lot
    bandit.py       which version earns most, context by context, and whether one is to be promoted
    drift.py        whether what serves gets worse, domain by domain

All but the stream and the journal are pure functions and values; nothing here needs torch or Ray.
"""
