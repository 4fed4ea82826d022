package bpf

// Decode is decode for the fuzz test, without the types that only this package needs.
func Decode(b []byte) (netns uint32, port uint16, address string, err error) {
	l, err := decode(b)
	return l.at.netns, l.at.port, l.address.String(), err
}
