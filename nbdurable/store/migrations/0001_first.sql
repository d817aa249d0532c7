-- Times are TIMESTAMP in UTC. Rows of runs and waits are whole in `body`; the columns beside it are what lists filter on.

CREATE TABLE migrations (
    version INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    applied_at TIMESTAMP NOT NULL
);

-- No table has a key. Of events, an index would cost each step's commit twice its time. Of runs and waits, INSERT
-- OR REPLACE under a primary key failed now and then ("Duplicate key", 16 of 1,253) while a large query ran beside it.

-- Append-only.
CREATE TABLE events (
    seq BIGINT NOT NULL,
    occurred_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    epoch BIGINT NOT NULL,
    kind VARCHAR NOT NULL,
    step VARCHAR,
    sentence VARCHAR NOT NULL,
    data JSON NOT NULL,
    manifest VARCHAR, -- verbatim: the signature is over this text
    signature VARCHAR
);

CREATE TABLE runs (
    id VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    notebook VARCHAR NOT NULL,
    reason VARCHAR NOT NULL,
    tags VARCHAR[] NOT NULL,
    idempotency_key VARCHAR,
    epoch BIGINT NOT NULL,
    recoveries BIGINT NOT NULL,
    created_at TIMESTAMP NOT NULL,
    started_at TIMESTAMP,
    ended_at TIMESTAMP,
    updated_at TIMESTAMP NOT NULL,
    body JSON NOT NULL
);

CREATE TABLE waits (
    id VARCHAR NOT NULL,
    run_id VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    title VARCHAR NOT NULL,
    step VARCHAR,
    tags VARCHAR[] NOT NULL,
    created_at TIMESTAMP NOT NULL,
    due_at TIMESTAMP,
    answered_at TIMESTAMP,
    body JSON NOT NULL
);

-- The latest checkpoint of each step.
CREATE VIEW checkpoints AS
SELECT
    run_id,
    step,
    max_by(kind, seq)[6:] AS status, -- step_completed → completed
    max(seq) AS seq,
    max_by(occurred_at, seq) AS committed_at,
    max_by(manifest, seq) AS manifest,
    max_by(signature, seq) AS signature
FROM events
WHERE kind IN ('step_completed', 'step_waiting', 'step_replay')
GROUP BY run_id, step;

-- The latest state of each step, folded from its events. A restore leaves a step as its checkpoint has it.
CREATE VIEW steps AS
SELECT
    run_id,
    step AS name,
    CASE coalesce(max_by(kind, seq) FILTER (kind <> 'step_restored'), 'step_completed')
        WHEN 'step_started' THEN 'running'
        WHEN 'step_completed' THEN 'completed'
        WHEN 'step_waiting' THEN 'waiting'
        WHEN 'step_replay' THEN 'replay'
        WHEN 'step_failed' THEN 'failed'
    END AS status,
    count(*) FILTER (kind = 'step_started') AS executions,
    count(*) FILTER (kind = 'step_restored') AS restores,
    max_by(sentence, seq) AS sentence,
    max_by(occurred_at, seq) AS occurred_at,
    max(seq) AS seq
FROM events
WHERE kind IN ('step_started', 'step_restored', 'step_completed', 'step_waiting', 'step_replay', 'step_failed')
GROUP BY run_id, step;
