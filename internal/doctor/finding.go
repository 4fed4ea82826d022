package doctor

import (
	"fmt"
	"strconv"
	"strings"
)

// Status is how bad a Finding is.
type Status string

// The statuses, from good to bad.
const (
	OK      Status = "ok"
	Warning Status = "warning" // works, but slower, later or not for everyone
	Problem Status = "problem" // images are not pulled through Hearth, or nothing starts
)

// Finding is the outcome of one check.
type Finding struct {
	Check   string `json:"check"`
	Status  Status `json:"status"`
	Found   string `json:"found"`
	Meaning string `json:"meaning,omitempty"` // why it matters; empty if all is well
	Fix     *Fix   `json:"fix,omitempty"`
}

// Fix is what to change: a line of a table of a file, or in words where no file is at fault.
type Fix struct {
	File  string `json:"file,omitempty"`
	Table string `json:"table,omitempty"`
	Line  string `json:"line,omitempty"`
	Do    string `json:"do,omitempty"`
}

// String is the fix in one line.
func (f *Fix) String() string {
	if f == nil {
		return ""
	}
	var parts []string
	if f.Line != "" {
		parts = append(parts, strings.Join(strings.Fields(fmt.Sprintf("in %s: %s", f.File, f.Table)), " ")+" "+f.Line)
	}
	if f.Do != "" {
		parts = append(parts, f.Do)
	}
	return strings.Join(parts, "; ")
}

// Failed says whether one of the findings is a problem.
func Failed(findings []Finding) bool {
	for _, f := range findings {
		if f.Status == Problem {
			return true
		}
	}
	return false
}

func ok(check, format string, args ...any) Finding {
	return Finding{Check: check, Status: OK, Found: fmt.Sprintf(format, args...)}
}

// heading is a table's line in TOML, with ids that have dots in quotes; the top level has none.
func heading(keys ...string) string {
	if len(keys) == 0 {
		return ""
	}
	quoted := make([]string, len(keys))
	for i, key := range keys {
		quoted[i] = key
		if strings.ContainsFunc(key, func(r rune) bool { return !isBare(r) }) {
			quoted[i] = "'" + key + "'"
			if strings.ContainsAny(key, "'\n") {
				quoted[i] = strconv.Quote(key)
			}
		}
	}
	return "[" + strings.Join(quoted, ".") + "]"
}

func isBare(r rune) bool {
	return r == '-' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z'
}
