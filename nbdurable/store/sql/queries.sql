-- What the store asks of DuckDB. A line `-- name: …` gives the statement below it its name.

-- name: insert_event
INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)

-- name: insert_events
INSERT INTO events
SELECT
    unnest(?::BIGINT[]), unnest(?::TIMESTAMP[]), unnest(?::VARCHAR[]), unnest(?::BIGINT[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::JSON[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[])

-- name: delete_runs
DELETE FROM runs WHERE id IN (SELECT unnest(?::VARCHAR[]))

-- name: insert_runs
INSERT INTO runs
SELECT
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[][]), unnest(?::VARCHAR[]), unnest(?::BIGINT[]), unnest(?::BIGINT[]),
    unnest(?::TIMESTAMP[]), unnest(?::TIMESTAMP[]), unnest(?::TIMESTAMP[]), unnest(?::TIMESTAMP[]), unnest(?::JSON[])

-- name: delete_waits
DELETE FROM waits WHERE id IN (SELECT unnest(?::VARCHAR[]))

-- name: insert_waits
INSERT INTO waits
SELECT
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]), unnest(?::VARCHAR[]),
    unnest(?::VARCHAR[]), unnest(?::VARCHAR[][]),
    unnest(?::TIMESTAMP[]), unnest(?::TIMESTAMP[]), unnest(?::TIMESTAMP[]), unnest(?::JSON[])

-- name: set_applied
UPDATE journal SET applied = ?

-- name: journal
SELECT store, applied FROM journal

-- name: insert_migration
INSERT INTO migrations VALUES (?, ?, ?)

-- name: is_nbdurable
SELECT count(*) > 0 FROM duckdb_tables() WHERE table_name = 'migrations'

-- name: version
SELECT coalesce(max(version), 0) FROM migrations

-- name: last_seq
SELECT coalesce(max(seq), 0) FROM events

-- name: read_through
SELECT
    (SELECT bit_xor(hash(events)) FROM events),
    (SELECT bit_xor(hash(runs)) FROM runs),
    (SELECT bit_xor(hash(waits)) FROM waits)

-- name: open_runs
SELECT body FROM runs WHERE NOT list_contains($final, status) ORDER BY id

-- name: open_waits
SELECT body FROM waits WHERE status = $open ORDER BY created_at, id

-- name: run
SELECT body FROM runs WHERE id = $1

-- name: runs_matching
SELECT id FROM runs WHERE starts_with(id, $fragment) OR ends_with(id, $fragment) ORDER BY id DESC LIMIT 10

-- name: runs_with_keys
SELECT
    min_by(body, (epoch_us(created_at) * CASE WHEN starts_with(idempotency_key, 'call:') THEN -1 ELSE 1 END, id))
FROM runs
WHERE idempotency_key IN (SELECT unnest($idempotency_keys::VARCHAR[]))
    AND coalesce((body -> '$.key_expires_at')::DOUBLE, epoch_us(created_at) / 1e6 + $life_s) > $now
    AND (NOT list_contains($released, status) OR starts_with(idempotency_key, 'call:'))
GROUP BY idempotency_key

-- name: runs
SELECT body FROM runs
WHERE ($status IS NULL OR status = $status)
    AND ($notebook IS NULL OR notebook = $notebook)
    AND ($kind IS NULL OR kind = $kind)
    AND ($tag IS NULL OR list_contains(tags, $tag))
    AND ($before IS NULL OR id < $before)
    AND ($parent IS NULL OR body ->> '$.parent_id' = $parent)
    AND ($root IS NULL OR body ->> '$.root_id' = $root)
ORDER BY id DESC LIMIT $limit

-- name: events
SELECT seq, epoch_us(occurred_at) / 1e6, run_id, epoch, kind, step, sentence, data FROM events
WHERE run_id = $run_id AND seq > $after
ORDER BY seq LIMIT $limit

-- name: checkpoints
WITH own AS (
    SELECT seq, occurred_at, step, kind, manifest, signature,
        max(CASE WHEN kind = 'step_set_aside' THEN seq END) OVER (PARTITION BY step) AS aside
    FROM events
    WHERE run_id = $run_id
        AND kind IN (
            'step_completed', 'step_waiting', 'step_replay', 'step_shared', 'step_marked', 'step_set_aside'
        )
)
SELECT
    $run_id, step, CASE max_by(kind, seq) WHEN 'step_waiting' THEN 'waiting' WHEN 'step_replay' THEN 'replay' ELSE 'completed' END,
    max(seq), epoch_us(max_by(occurred_at, seq)) / 1e6, max_by(manifest, seq), max_by(signature, seq)
FROM own
WHERE manifest IS NOT NULL AND seq <= $until AND seq > coalesce(aside, 0)
    AND seq NOT IN (
        SELECT unnest(from_json(data -> 'seqs', '["BIGINT"]')) FROM events
        WHERE run_id = $run_id AND kind = 'checkpoints_removed'
    )
GROUP BY step ORDER BY max(seq)

-- name: checkpoint
SELECT run_id, step, status, seq, epoch_us(committed_at) / 1e6, manifest, signature FROM checkpoints
WHERE run_id = $run_id AND step = $step
    AND seq NOT IN (
        SELECT unnest(from_json(data -> 'seqs', '["BIGINT"]')) FROM events
        WHERE run_id = $run_id AND kind = 'checkpoints_removed'
    )

-- name: all_checkpoints
SELECT run_id, step, seq, manifest, kind = 'call_completed' FROM events
WHERE ($run_id IS NULL OR run_id = $run_id)
    AND kind IN (
        'step_completed', 'step_waiting', 'step_replay', 'step_shared', 'step_marked', 'call_completed'
    )
    AND seq NOT IN (
        SELECT unnest(from_json(data -> 'seqs', '["BIGINT"]')) FROM events WHERE kind = 'checkpoints_removed'
    )

-- name: calls
SELECT
    seq, epoch_us(occurred_at) / 1e6, run_id, epoch, kind, step, sentence, data,
    CASE WHEN $results THEN manifest END, signature
FROM events
WHERE run_id = $run_id AND kind = 'call_completed' AND ($step IS NULL OR step = $step)
    AND seq NOT IN (
        SELECT unnest(from_json(data -> 'seqs', '["BIGINT"]')) FROM events
        WHERE run_id = $run_id AND kind = 'checkpoints_removed'
    )
ORDER BY seq DESC LIMIT $limit

-- name: wait
SELECT body FROM waits WHERE id = $1

-- name: waits
SELECT body FROM waits
WHERE ($run_id IS NULL OR run_id = $run_id)
    AND ($status IS NULL OR status = $status)
    AND ($kind IS NULL OR kind = $kind)
ORDER BY created_at, id LIMIT $limit

-- name: sent_events
SELECT
    seq, epoch_us(occurred_at) / 1e6, data ->> 'event', data ->> 'key', data ->> 'digest',
    (data -> 'expires_at')::DOUBLE
FROM events
WHERE run_id = '' AND kind = 'event_sent' AND occurred_at >= $since
ORDER BY seq

-- name: taken_events
SELECT (body -> '$.answer.event_seq')::BIGINT, run_id FROM waits
WHERE kind = 'event' AND status = 'answered' AND answered_at >= $since
    AND (body ->> '$.answer.event_seq') IS NOT NULL
