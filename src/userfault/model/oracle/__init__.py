"""Replay measured cases on the model: `python -m userfault.model.oracle TABLE.jsonl[.xz]`.

    table row --id--> scenario (sections/): the probe's steps on the model --> observations
                                                                                |
    table row -------- its observations -------------------------- compare ----+--> agree, disagree,
    unsupported

A row agrees only if everything it observed was compared and is the same. `excl` (a page is mapped once)
depends on how a page was made and is left out; so are the remarks of the probe's author (`note`).
"Unsupported" is a case for which there is no scenario; it is never counted as agreement.
"""
