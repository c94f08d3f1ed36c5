"""The commands of `tiedjax analyze`, one file per instrument. Nothing heavy is imported before one runs.

Each file has

    HELP                    one line
    SUBJECT                 what it takes: "run" (RUN), "table" (TABLE), "tables" (one or two) or "pair" (A and B)
    add_arguments(parser)   its arguments and options
    run(args)               what `--json` writes, and the text that is printed; UserError for bad input
"""
