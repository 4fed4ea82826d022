package daemon

// What the tests reach inside: the parser, for fuzzing, and the part of Execute without sockets, for synthetic time.
var (
	ApplyConfig = applyConfig
	Supervise   = supervise
)
