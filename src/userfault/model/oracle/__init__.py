"""Replay measured cases on the model: `python -m userfault.model.oracle TABLE.jsonl[.xz]`.

    row --id--> scenario (sections/): the probe's steps on the model --> what the model shows
     |                                                                        |
     `--------- what was observed ------------------> compare <---------------'
                                                        |
                                          agree, disagree, unsupported

A row agrees only if everything it observed was compared and is the same. Two fields depend on how a page was
made and are left out unless `--strict` asks for them: `excl` (a page is mapped once), and `scan` in rows
whose subject is not tracking by WP_ASYNC. "Unsupported" is a case for which there is no scenario; it is never
counted as agreement.
"""
