package registry

import (
	"fmt"
	"strconv"
	"strings"
)

// contentRange is the meaning of "bytes first-last/total".
type contentRange struct {
	first, last int64 // both inclusive
	total       int64 // -1 if the server does not know
}

// parseContentRange reads the header of a 206 as RFC 9110, 14.4 has it. What it
// returns is consistent: 0 ≤ first ≤ last < total.
func parseContentRange(v string) (contentRange, error) {
	bad := fmt.Errorf("Content-Range %q: %w", v[:min(len(v), 100)], ErrProtocol)
	unit, rest, ok := strings.Cut(v, " ")
	if !ok || !strings.EqualFold(unit, "bytes") {
		return contentRange{}, bad
	}
	span, total, ok := strings.Cut(rest, "/")
	if !ok {
		return contentRange{}, bad
	}
	first, last, ok := strings.Cut(span, "-")
	if !ok {
		return contentRange{}, bad
	}
	r := contentRange{total: -1}
	numbers := []struct {
		text string
		to   *int64
	}{{first, &r.first}, {last, &r.last}, {total, &r.total}}
	if total == "*" {
		numbers = numbers[:2]
	}
	for _, n := range numbers {
		u, err := strconv.ParseUint(n.text, 10, 63) // no sign, unlike ParseInt
		if err != nil {
			return contentRange{}, bad
		}
		*n.to = int64(u)
	}
	if r.first > r.last || (r.total >= 0 && r.last >= r.total) {
		return contentRange{}, bad
	}
	return r, nil
}
