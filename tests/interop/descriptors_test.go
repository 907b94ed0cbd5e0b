package interop

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ourFile compiles proto/runtime/v1/api.proto from its source.
func ourFile(t *testing.T) *descriptorpb.FileDescriptorProto {
	t.Helper()
	compiler := protocompile.Compiler{
		Resolver: &protocompile.SourceResolver{ImportPaths: []string{"../../proto"}},
	}
	files, err := compiler.Compile(context.Background(), "runtime/v1/api.proto")
	if err != nil {
		t.Fatalf("compile our api.proto: %v", err)
	}
	return protodesc.ToFileDescriptorProto(files[0])
}

// theirFile is what the Go module k8s.io/cri-api was compiled from.
func theirFile() *descriptorpb.FileDescriptorProto {
	return protodesc.ToFileDescriptorProto(runtimeapi.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto)
}

// elements spreads a file out: path to everything that is said of that element itself, its children left out.
// Nothing is selected by name, so whatever protobuf can say (numbers, types, labels, oneofs, reserved ranges, options
// such as deprecated, streaming) is part of the comparison.
func elements(file *descriptorpb.FileDescriptorProto) map[string]string {
	found := map[string]string{}
	add := func(kind, path string, message proto.Message) {
		found[kind+" "+path] = prototext.MarshalOptions{Multiline: false}.Format(message)
	}
	var addEnum func(string, *descriptorpb.EnumDescriptorProto)
	addEnum = func(prefix string, enum *descriptorpb.EnumDescriptorProto) {
		path := prefix + enum.GetName()
		own := proto.Clone(enum).(*descriptorpb.EnumDescriptorProto)
		own.Value = nil
		add("enum", path, own)
		for _, value := range enum.GetValue() {
			add("value", path+"."+value.GetName(), value)
		}
	}
	var addMessage func(string, *descriptorpb.DescriptorProto)
	addMessage = func(prefix string, message *descriptorpb.DescriptorProto) {
		path := prefix + message.GetName()
		own := proto.Clone(message).(*descriptorpb.DescriptorProto)
		own.Field, own.NestedType, own.EnumType = nil, nil, nil
		add("message", path, own)
		for _, field := range message.GetField() {
			own := proto.Clone(field).(*descriptorpb.FieldDescriptorProto)
			// Derived from the name; compilers differ in whether they write it down.
			own.JsonName = nil
			add("field", path+"."+field.GetName(), own)
		}
		for _, nested := range message.GetNestedType() {
			addMessage(path+".", nested)
		}
		for _, enum := range message.GetEnumType() {
			addEnum(path+".", enum)
		}
	}
	for _, message := range file.GetMessageType() {
		addMessage("", message)
	}
	for _, enum := range file.GetEnumType() {
		addEnum("", enum)
	}
	for _, service := range file.GetService() {
		own := proto.Clone(service).(*descriptorpb.ServiceDescriptorProto)
		own.Method = nil
		add("service", service.GetName(), own)
		for _, method := range service.GetMethod() {
			add("method", service.GetName()+"."+method.GetName(), method)
		}
	}
	own := proto.Clone(file).(*descriptorpb.FileDescriptorProto)
	own.Name, own.SourceCodeInfo = nil, nil
	own.MessageType, own.EnumType, own.Service = nil, nil, nil
	add("file", file.GetPackage(), own)
	return found
}

// differences names everything that one side has and the other has not, or has otherwise.
func differences(ours, theirs *descriptorpb.FileDescriptorProto) []string {
	left, right := elements(ours), elements(theirs)
	var found []string
	for path, text := range left {
		switch other, ok := right[path]; {
		case !ok:
			found = append(found, fmt.Sprintf("%s: only in vmrt's", path))
		case other != text:
			found = append(found, fmt.Sprintf("%s: vmrt's is %s, Kubernetes's is %s", path, text, other))
		}
	}
	for path := range right {
		if _, ok := left[path]; !ok {
			found = append(found, fmt.Sprintf("%s: only in Kubernetes's", path))
		}
	}
	sort.Strings(found)
	return found
}

// TestDescriptors holds our statement of the interface to the one that kubelet is compiled with, in both directions.
func TestDescriptors(t *testing.T) {
	ours, theirs := ourFile(t), theirFile()
	if count := len(elements(theirs)); count < 800 {
		t.Fatalf("only %d elements were compared", count)
	}
	for _, difference := range differences(ours, theirs) {
		t.Error(difference)
	}
}

// TestDescriptorsDiffer shows that the comparison sees every kind of difference.
func TestDescriptorsDiffer(t *testing.T) {
	message := func(file *descriptorpb.FileDescriptorProto, name string) *descriptorpb.DescriptorProto {
		for _, message := range file.GetMessageType() {
			if message.GetName() == name {
				return message
			}
		}
		t.Fatalf("no message %s", name)
		return nil
	}
	for name, change := range map[string]func(*descriptorpb.FileDescriptorProto){
		"field VersionRequest.version": func(f *descriptorpb.FileDescriptorProto) {
			message(f, "VersionRequest").Field[0].Number = proto.Int32(9)
		},
		"field Mount.readonly": func(f *descriptorpb.FileDescriptorProto) {
			message(f, "Mount").Field[2].Type = descriptorpb.FieldDescriptorProto_TYPE_INT32.Enum()
		},
		"field DNSConfig.servers": func(f *descriptorpb.FileDescriptorProto) {
			message(f, "DNSConfig").Field[0].Label = descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum()
		},
		"field LinuxSandboxSecurityContext.seccomp_profile_path": func(f *descriptorpb.FileDescriptorProto) {
			fields := message(f, "LinuxSandboxSecurityContext").Field
			fields[len(fields)-1].Options = nil
		},
		"field AuthConfig.password": func(f *descriptorpb.FileDescriptorProto) {
			message(f, "AuthConfig").Field[1].Options = nil
		},
		"message ImageSpec": func(f *descriptorpb.FileDescriptorProto) {
			message(f, "ImageSpec").ReservedName = []string{"digest"}
		},
		"message VersionRequest": func(f *descriptorpb.FileDescriptorProto) { f.MessageType = f.MessageType[1:] },
		"message Invented": func(f *descriptorpb.FileDescriptorProto) {
			f.MessageType = append(f.MessageType, &descriptorpb.DescriptorProto{Name: proto.String("Invented")})
		},
		"value Protocol.SCTP": func(f *descriptorpb.FileDescriptorProto) {
			f.EnumType[0].Value[2].Number = proto.Int32(7)
		},
		"method RuntimeService.Version": func(f *descriptorpb.FileDescriptorProto) {
			f.Service[0].Method[0].ServerStreaming = proto.Bool(true)
		},
		"file runtime.v1": func(f *descriptorpb.FileDescriptorProto) { f.Options = nil },
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			changed := proto.Clone(theirFile()).(*descriptorpb.FileDescriptorProto)
			change(changed)
			found := differences(changed, theirFile())
			if !slices.ContainsFunc(found, func(line string) bool { return strings.HasPrefix(line, name+":") }) {
				t.Errorf("found %q, not %q", found, name)
			}
		})
	}
}
