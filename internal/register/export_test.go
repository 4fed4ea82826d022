package register

// For tests of what is read from the machine.
var (
	UnitOf      = unitOf
	ParseRecord = parseRecord
	MountsBelow = mountsBelow
	Preview     = preview
)

// ConfigOf is the configuration that a containerd with these arguments reads.
func ConfigOf(cwd string, args ...string) string { return (&process{cwd: cwd, args: args}).config() }
