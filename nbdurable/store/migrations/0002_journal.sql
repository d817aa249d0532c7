-- One row: which store this is, and the last record of its journal that the other tables hold.
CREATE TABLE journal (
    store VARCHAR NOT NULL,
    applied BIGINT NOT NULL
);
INSERT INTO journal VALUES (uuid()::VARCHAR, 0);
