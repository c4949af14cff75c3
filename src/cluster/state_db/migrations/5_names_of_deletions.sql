-- Format 5: names of deleted packages and artifacts. Before it, they were only counted.
ALTER TABLE vanished
    ADD COLUMN IF NOT EXISTS package_names text[] NOT NULL DEFAULT '{}',
    ADD COLUMN IF NOT EXISTS artifact_keys text[] NOT NULL DEFAULT '{}';
