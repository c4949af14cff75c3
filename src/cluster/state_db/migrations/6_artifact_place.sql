-- Format 6: the bucket for which artifacts are recorded, and the one who brings them there. Before it, that was always us.
-- `proved`: since it is this place, a pass has proved the artifact of each row.
CREATE TABLE IF NOT EXISTS artifact_place (
    mode text NOT NULL,
    endpoint text NOT NULL,
    bucket text NOT NULL,
    proved boolean NOT NULL);
