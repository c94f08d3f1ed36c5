"""The sections of the report, one file per instrument.

Each file has

    collect(study)    what results.json holds under the section's name: plain records, from the study's runs
    plots(results)    its figures, drawn from results.json alone

and what its template, `templates/sections/NAME.html.j2`, calls to put numbers into words (there it is `s`).
"""
