package prefetch

// Access is part of a file that a container has read or mapped.
type Access struct {
	Device, Inode  uint64 // Device as stat's st_dev has it
	Offset, Length int64  // bytes
	Ready          bool   // after Recording.Ready
}

// Trace is what containers have needed, in the order of first need.
type Trace struct {
	Accesses []Access
	Lost     uint64 // events
	Method   string
}

// Tracer records what containers read.
type Tracer interface {
	// Begin records for these absolute cgroup directories, from files on the file systems that these trees are on.
	Begin(cgroups, roots []string) (Recording, error)
}

// Recording is one under way.
type Recording interface {
	// Ready says that what comes now is not needed for getting ready.
	Ready()
	// End ends it, whatever it returns.
	End() (Trace, error)
}
