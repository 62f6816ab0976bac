// Greedy tokens from a folder that `fxfuse export --format pt2` wrote: libtorch alone, no Python.
//
//     generate FOLDER COUNT ID [ID ...]
//
// Prints the tokens that follow the prompt.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;
using Weights = std::unordered_map<std::string, at::Tensor>;

// The weights by name; torch.save wrote them, and torch.load reads them as well.
Weights read_weights(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    Weights weights;
    for (const auto& entry : torch::pickle_load(bytes).toGenericDict())
        weights.emplace(entry.key().toStringRef(), entry.value().toTensor());
    return weights;
}

// A graph asks for its weights by name. Both graphs read the same memory, which has to outlive them.
void give_weights(AOTIModelPackageLoader& graph, const Weights& weights) {
    Weights own;
    for (const auto& name : graph.get_constant_fqns()) own.emplace(name, weights.at(name));
    graph.load_constants(own, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
}

// Keys and values of each layer that has any: [room, batch, heads, width].
std::vector<at::Tensor> make_caches(const std::unordered_map<std::string, std::string>& told, int64_t room) {
    const std::string kind = told.at("cache_dtype");
    const auto dtype = kind == "float64"    ? torch::kFloat64
                       : kind == "bfloat16" ? torch::kBFloat16
                       : kind == "float16"  ? torch::kFloat16
                                            : torch::kFloat32;
    std::istringstream numbers(told.at("caches"));
    std::vector<at::Tensor> caches;
    for (int64_t heads, key, value; numbers >> heads >> key >> value;)
        for (int64_t width : {key, value}) caches.push_back(torch::zeros({room, 1, heads, width}, dtype));
    return caches;
}

int main(int count_of_arguments, char** arguments) {
    if (count_of_arguments < 4) {
        std::cerr << "usage: generate FOLDER COUNT ID [ID ...]\n";
        return 2;
    }
    const torch::InferenceMode no_gradients;
    const std::string folder = arguments[1];
    const int64_t count = std::stoll(arguments[2]);
    std::vector<int64_t> prompt;
    for (int place = 3; place < count_of_arguments; ++place) prompt.push_back(std::stoll(arguments[place]));

    const Weights weights = read_weights(folder + "/weights.pt");
    AOTIModelPackageLoader prefill(folder + "/model.pt2", "prefill"), decode(folder + "/model.pt2", "decode");
    give_weights(prefill, weights);
    give_weights(decode, weights);

    int64_t total = static_cast<int64_t>(prompt.size());
    const auto caches = make_caches(prefill.get_metadata(), total + count);
    at::Tensor ids = torch::tensor(prompt, torch::kInt64).unsqueeze(0);
    for (int64_t made = 0; made < count; ++made, ++total) {
        std::vector<at::Tensor> inputs{ids, torch::ones({1, total}, torch::kBool)};
        for (const auto& cache : caches) inputs.push_back(cache.narrow(0, 0, total));  // a view: nothing is copied
        auto& graph = ids.size(1) > 1 ? prefill : decode;
        ids = graph.run(inputs)[0].argmax(-1, /*keepdim=*/true);
        std::cout << ids.item<int64_t>() << (made + 1 < count ? ' ' : '\n') << std::flush;
    }
}
