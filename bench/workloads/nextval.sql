-- Numbers for a batch of rows, from one sequence that everyone uses.
SELECT max(nextval('ids')) FROM generate_series(1, 1000);
