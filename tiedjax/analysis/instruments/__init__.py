"""One folder for each instrument: its computation, its command, its section of the report.

`command.py`, which imports nothing heavy before it runs, has

    HELP                    one line
    SUBJECT                 what it takes: "run" (RUN), "table" (TABLE), "tables" (one or two) or "pair" (A and B)
    add_arguments(parser)   its arguments and options
    run(args)               what `--json` writes, and the text that is printed; UserError for bad input

`section.py` has

    collect(study)    what results.json holds under the section's name: plain records, from the study's runs
    plots(results)    its figures, drawn from results.json alone

and what `section.html.j2` calls to put numbers into words (there it is `s`).
"""
