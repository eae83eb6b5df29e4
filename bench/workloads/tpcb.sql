\set account random(1, 200000)
\set branch random(1, 256)
\set teller random(1, 2560)
\set delta random(-5000, 5000)
BEGIN;
UPDATE accounts SET balance = balance + :delta WHERE id = :account;
SELECT balance FROM accounts WHERE id = :account;
UPDATE tellers SET balance = balance + :delta WHERE id = :teller;
UPDATE branches SET balance = balance + :delta WHERE id = :branch;
INSERT INTO history VALUES (:teller, :branch, :account, :delta, now());
COMMIT;
