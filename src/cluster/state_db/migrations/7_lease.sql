-- Format 7: the lease of a shared bucket, as this cluster saw or wrote it last. `number` never falls within a series: a
-- lease with a lower one is of a store that was set back. `fenced_for`: this cluster has fenced itself for a cluster that
-- takes that epoch.
CREATE TABLE IF NOT EXISTS lease (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    series text NOT NULL,
    number bigint NOT NULL,
    epoch bigint NOT NULL,
    holder text NOT NULL,
    nonce text NOT NULL,
    fenced_for bigint);
