package bpf

// Decode is decode for the fuzz test, without the types that only this package needs.
func Decode(b []byte) (netns uint32, port uint16, address string, err error) {
	l, err := decode(b)
	return l.at.netns, l.at.port, l.address.String(), err
}

// DecodePage is decodePage.
var DecodePage = decodePage

// ColdOnly has a probe use what every kernel has.
func ColdOnly(p *PageProbe) { p.hooks = p.hooks[:1] }

// Programs are the ids of a watcher's programs.
func Programs(w *PageWatcher) []uint32 {
	var ids []uint32
	for _, p := range w.progs {
		if info, err := p.Info(); err == nil {
			if id, ok := info.ID(); ok {
				ids = append(ids, uint32(id))
			}
		}
	}
	return ids
}
