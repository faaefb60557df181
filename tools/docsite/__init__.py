"""The site of the documents: what is here, arranged for MkDocs, with example pages. `make docs` builds it."""
