package daemon

// What the tests reach inside: the parser, for fuzzing, and parts without sockets, for synthetic time.
var (
	ApplyConfig = applyConfig
	Supervise   = supervise
	UntilExpiry = untilExpiry
)
