"""The command `gmem`: one module per verb, imported when the verb is used."""
