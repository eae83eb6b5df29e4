CREATE TABLE events (id bigserial PRIMARY KEY, source int NOT NULL, payload text NOT NULL);
