"""Two pages of docs/, made from runs: how one page is lent (`tour.md`), and the life of a page (`page-life.svg`)."""
