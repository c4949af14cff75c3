-- Format 8: the processes of a cluster that is fed from its primary's site. `held_for`: the direction of the process that took
-- the working lock last. Table `nodes`: each process that pushes, or that waits while another one pushes, with the role that
-- its configuration asks for. `serves`: the process at work lets clients use the cluster as the primary. `hold`: why it
-- applies nothing. `checks`: what only the process's own node can check, as JSON. `disk_`: the disk of the server there.
ALTER TABLE meta ADD COLUMN IF NOT EXISTS held_for text NOT NULL DEFAULT 'pull';
CREATE TABLE IF NOT EXISTS nodes (
    direction text NOT NULL,
    name text NOT NULL,
    site text NOT NULL,
    seen timestamptz NOT NULL,
    role text NOT NULL,
    force_epoch bigint NOT NULL,
    serves boolean NOT NULL,
    hold text NOT NULL,
    checks text NOT NULL,
    disk_directory text,
    disk_free bigint,
    disk_total bigint,
    PRIMARY KEY (direction, name));
