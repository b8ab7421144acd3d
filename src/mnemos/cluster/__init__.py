"""Several engines behind one address: each conversation goes to the replica that has its beginning in its cache."""
