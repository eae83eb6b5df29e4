\set account random(1, 200000)
SELECT balance FROM accounts WHERE id = :account;
