\set other random(0, :clients - 1)
SELECT work_on_tasks(:client_id, :other);
