"""Find the tool calls in the text of an answer, in the formats of the model families."""
