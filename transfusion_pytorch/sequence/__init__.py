"""What a batch is: ids, samples, the packed stream, who sees whom, and where everything stands."""
