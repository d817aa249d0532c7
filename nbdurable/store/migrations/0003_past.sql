-- Checkpoints that a fork shares with the run that it comes from, steps that a person did by hand, and steps whose
-- checkpoints a repair set aside: an earlier checkpoint of such a step counts no more.

CREATE OR REPLACE VIEW checkpoints AS
WITH aside AS (
    SELECT run_id, step, max(seq) AS seq FROM events WHERE kind = 'step_set_aside' GROUP BY run_id, step
)
SELECT
    e.run_id,
    e.step,
    CASE max_by(e.kind, e.seq) WHEN 'step_waiting' THEN 'waiting' WHEN 'step_replay' THEN 'replay' ELSE 'completed' END
        AS status,
    max(e.seq) AS seq,
    max_by(e.occurred_at, e.seq) AS committed_at,
    max_by(e.manifest, e.seq) AS manifest,
    max_by(e.signature, e.seq) AS signature
FROM events e LEFT JOIN aside USING (run_id, step)
WHERE e.kind IN ('step_completed', 'step_waiting', 'step_replay', 'step_shared', 'step_marked')
    AND e.seq > coalesce(aside.seq, 0)
GROUP BY e.run_id, e.step;

CREATE OR REPLACE VIEW steps AS
SELECT
    run_id,
    step AS name,
    CASE coalesce(max_by(kind, seq) FILTER (kind <> 'step_restored'), 'step_completed')
        WHEN 'step_started' THEN 'running'
        WHEN 'step_completed' THEN 'completed'
        WHEN 'step_shared' THEN 'completed'
        WHEN 'step_marked' THEN 'completed'
        WHEN 'step_waiting' THEN 'waiting'
        WHEN 'step_replay' THEN 'replay'
        WHEN 'step_failed' THEN 'failed'
        WHEN 'step_set_aside' THEN 'pending'
    END AS status,
    count(*) FILTER (kind = 'step_started') AS executions,
    count(*) FILTER (kind = 'step_restored') AS restores,
    max_by(sentence, seq) AS sentence,
    max_by(occurred_at, seq) AS occurred_at,
    max(seq) AS seq
FROM events
WHERE kind IN (
    'step_started', 'step_restored', 'step_completed', 'step_waiting', 'step_replay', 'step_failed', 'step_shared',
    'step_marked', 'step_set_aside'
)
GROUP BY run_id, step;
